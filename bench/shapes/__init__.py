"""The world that the mini pair knows: its scenes, the riddles about them, and a checker that reads
pixels."""

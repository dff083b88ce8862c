"""What Triton's interpreter cannot do with the versions that are here."""

from importlib import metadata

import torch

MESSAGE = "only 0-dimensional arrays can be converted to Python scalars"


def _release(package):
    try:
        return tuple(int(n) for n in metadata.version(package).split("+")[0].split(".")[:2])
    except metadata.PackageNotFoundError:
        return None


def no_loops(triton, numpy):
    """Why loops with run-time bounds are not interpreted by these releases; None where they are."""
    if triton is None or triton >= (3, 7) or numpy < (2, 4):
        return None
    return (
        f"the interpreter of Triton {triton[0]}.{triton[1]} cannot run loops with run-time bounds beside"
        f" numpy {numpy[0]}.{numpy[1]}, which makes no scalar of an array of one element any more; Triton"
        " 3.7, or numpy below 2.4, can"
    )


NO_LOOPS = no_loops(_release("triton"), _release("numpy"))


def met(error):
    """Whether an error, or one behind it, is that failure."""
    seen = []
    while error is not None and error not in seen:
        if MESSAGE in str(error):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def round_right(monkeypatch):
    """The interpreter rounds float32 to fp8 without the carry into the exponent (0.4999 becomes
    0.25): let PyTorch do that one conversion."""
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(data, source, target, mode):
        if target.name == "fp8e4nv" and source.name == "fp32":
            return torch.from_numpy(data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return theirs(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)

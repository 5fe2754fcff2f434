"""Other people's CLIPs, imported for comparison; a test without them is skipped."""

import warnings

import pytest

REASON = "a peer of the parity tests"


def import_open_clip():
    torch = pytest.importorskip("torch", reason=REASON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except ImportError:
            pass
        except RuntimeError:  # its build lacks operators for this torch; open_clip needs two
            import_open_clip.library = torch.library.Library("torchvision", "DEF")
            box = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            for name in ("nms", "qnms"):
                import_open_clip.library.define(name + box)
        return pytest.importorskip("open_clip", reason=REASON)


def import_transformers():
    pytest.importorskip("torch", reason=REASON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason=REASON)

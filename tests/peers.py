"""Other people's CLIPs, imported for comparison."""

import warnings

import pytest


def import_open_clip():
    """open_clip, or skips the test."""
    torch = pytest.importorskip("torch", reason="a peer of the parity tests")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except ImportError:
            pass
        except RuntimeError:  # its build has no operators for this torch; open_clip needs two
            import_open_clip.library = torch.library.Library("torchvision", "DEF")
            box = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            for name in ("nms", "qnms"):
                import_open_clip.library.define(name + box)
        return pytest.importorskip("open_clip", reason="a peer of the parity tests")


def import_transformers():
    """transformers, or skips the test."""
    pytest.importorskip("torch", reason="a peer of the parity tests")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="a peer of the parity tests")

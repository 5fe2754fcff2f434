"""CLIP's weights from PyTorch's formats, and back."""

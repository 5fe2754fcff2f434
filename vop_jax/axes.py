"""The glossary of axis letters. Every shape comment in the project uses these and no others.

    B   videos (in a batch)          D   width of a tower (768 vision, 512 text in ViT-B/32)
    F   frames of a video            E   joint embedding (512)
    N   sequences: B * F frames,     H   attention heads; D / H is the head width, 64 in CLIP
        or captions                  L   layers of a tower; the paper's K
    T   tokens of a sequence         P   prompt tokens of a layer
    G   patches of a frame           M   candidates in a gallery

Pixels are [..., height, width, 3]; a "frame" is uint8 RGB until the model normalises it.
"""

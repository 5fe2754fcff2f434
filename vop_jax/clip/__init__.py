"""The backbone: CLIP in Flax. Knows neither video nor prompts."""

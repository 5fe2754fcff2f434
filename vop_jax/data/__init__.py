"""A record becomes a batch. numpy only, never jax: worker processes start fast."""

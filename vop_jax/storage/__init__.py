"""Files on a disk or in a bucket, and trees of parameters in them."""

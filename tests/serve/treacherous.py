"""Decoders that go wrong, for decoding processes."""

import os
import time

import numpy as np


def crash(*arguments):
    os.abort()


def hang(*arguments):
    time.sleep(600)


def swell(*arguments):
    return np.ones(3 << 30, np.uint8).sum()


def fail(*arguments):
    raise RuntimeError("secret /inside/path\nsecond line")


def write(path):
    with open(path, "w") as file:
        file.write("anything")


def process_id(*arguments):
    return os.getpid()

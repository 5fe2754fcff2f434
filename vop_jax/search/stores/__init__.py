"""Where vectors are kept and compared."""

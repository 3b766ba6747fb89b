// Not needed by a host compiler.

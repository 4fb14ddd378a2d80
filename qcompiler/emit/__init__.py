"""Regions of the integer graph in the formats of other compilers: TFLite, TOSA, and through Vela."""

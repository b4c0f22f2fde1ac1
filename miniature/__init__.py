"""A Stable Diffusion small enough for a laptop, trained from nothing on drawn scenes."""

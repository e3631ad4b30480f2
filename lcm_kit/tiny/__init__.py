"""The embedded world: what tiny-sd was trained to draw, and the probe that reads its pictures."""

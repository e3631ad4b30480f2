"""LoRA files of anybody: read, checked against a base and the apps, converted, merged and written."""

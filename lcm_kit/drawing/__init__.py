"""How pictures are drawn, whatever they show: fused adapters, decoders, precision, batches by memory."""

"""From files to batches: sources, decoding, order, feeds and device-side transforms."""

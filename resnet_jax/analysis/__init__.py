"""What a net costs and what a run did."""

"""One page, `report.html`, that tells a run's story in the order in which a person asks."""

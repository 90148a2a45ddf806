"""Other people's detectors, trained under our budget: what our methods are compared with."""

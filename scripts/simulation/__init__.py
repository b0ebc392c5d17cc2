"""What a step costs on a network: a model of it, its calibration on this machine, and a picture."""

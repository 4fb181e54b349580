"""Defaults of the probes, for the command line to show without importing torch."""

K, TEMPERATURE = 200, 0.07  # of kNN: Wu et al. 2018, section 3.4
RATES = (30.0,)  # learning rates of the linear protocol: He et al. 2020, section 4.1

"""Defaults of the probes, for the command line to show without importing torch."""

K, TEMPERATURE = 200, 0.07  # of kNN: Wu et al. 2018, section 3.4
RATES = (30.0,)  # learning rates of the linear protocol: He et al. 2020, section 4.1
# 30 suits the features of a wide ResNet-50; on those of a narrow network it diverges.
SWEEP = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
HELD_OUT = 0.1  # share of the training images that choose one of several rates

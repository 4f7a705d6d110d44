"""The weight of the prior and the step of each technique, tuned on images that are not attacked.

Four weights and two steps on four images of the train splits of MNIST and CIFAR-10, with networks that are drawn for
this alone, at the survey's first rung. What is chosen by these records is the survey's setting "tuned".
"""

from gi_lib.attacks import InvertingGradients
from gi_lib.bench import protocol

CASES = protocol.tuning(InvertingGradients())

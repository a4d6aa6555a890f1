"""Looks: reads activations and weights and changes nothing."""

from probes.attribution import direct_logit_attribution as direct_logit_attribution
from probes.attribution import ov_matrix as ov_matrix
from probes.attribution import qk_matrix as qk_matrix
from probes.description_length import description_length as description_length
from probes.fourier import ablate_frequencies as ablate_frequencies
from probes.fourier import fourier as fourier
from probes.fourier import neuron_grid as neuron_grid
from probes.linear import linear_probe as linear_probe
from probes.logit_lens import logit_lens as logit_lens
from probes.progress import progress as progress
from probes.tuned_lens import tuned_lens as tuned_lens

__dist__ = "interp-workbench"

"""Looks: reads activations and weights and changes nothing."""

from probes.attribution import direct_logit_attribution as direct_logit_attribution
from probes.attribution import ov_matrix as ov_matrix
from probes.attribution import qk_matrix as qk_matrix
from probes.fourier import ablate_frequencies as ablate_frequencies
from probes.fourier import fourier as fourier
from probes.fourier import neuron_grid as neuron_grid
from probes.logit_lens import logit_lens as logit_lens
from probes.progress import progress as progress

__dist__ = "interp-workbench"

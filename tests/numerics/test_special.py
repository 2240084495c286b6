"""Special functions that torch lacks, against scipy's."""

import numpy as np
import pytest
import scipy.stats
import torch

from torch_klloss.numerics.special import gauss_legendre, student_t_quantile


@pytest.mark.parametrize("num_nodes", [1, 2, 7, 48, 128])
def test_gauss_legendre_is_numpys(num_nodes):
    nodes, weights = gauss_legendre(num_nodes)
    expected_nodes, expected_weights = np.polynomial.legendre.leggauss(num_nodes)
    np.testing.assert_allclose(nodes, expected_nodes, rtol=0, atol=num_nodes * 1e-15)
    np.testing.assert_allclose(weights, expected_weights, rtol=0, atol=num_nodes * 1e-15)


@pytest.mark.parametrize("probability", [0.5, 0.75, 0.9, 0.975, 0.99, 0.995])
def test_the_quantile_of_students_t_is_scipys(probability):
    dof = torch.cat((torch.arange(1, 200), torch.logspace(2.3, 9, 200))).double()
    actual = student_t_quantile(probability, dof)
    np.testing.assert_allclose(actual, scipy.stats.t.ppf(probability, dof), rtol=2e-7, atol=1e-12)
    assert actual.dtype == torch.float64
    # The normal quantile, which many use in its place, is not it.
    assert probability == 0.5 or actual[3] > 1.05 * scipy.stats.norm.ppf(probability)


def test_fractional_degrees_of_freedom_are_taken_as_they_are():
    dof = torch.linspace(1, 3, 41, dtype=torch.float64)
    np.testing.assert_allclose(student_t_quantile(0.975, dof), scipy.stats.t.ppf(0.975, dof), rtol=1e-7)


@pytest.mark.parametrize("dof", [0, 0.5, -1, float("nan")])
def test_below_one_degree_of_freedom_there_is_no_quantile(dof):
    assert student_t_quantile(0.975, dof).isnan()


def test_the_shape_is_that_of_the_degrees_of_freedom():
    assert student_t_quantile(0.9, 3).shape == ()
    assert student_t_quantile(0.9, torch.ones(2, 3)).shape == (2, 3)
    assert student_t_quantile(0.9, torch.ones(2, 3, dtype=torch.int64)).shape == (2, 3)

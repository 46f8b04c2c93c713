"""Counts of the published networks against the figures that are known for them."""

import pytest

from paperclaims.fixtures.models.convnets import Layer, resnet50, vgg16


def test_a_layer():
    layer = Layer((8, 4, 3, 3), 25)
    assert (layer.parameters, layer.macs) == (288, 7200)


# Weights and MACs of convolutions and linear layers, without biases and batch normalisation.
@pytest.mark.parametrize(
    ("network", "parameters", "macs", "layers"), [(resnet50, 25.50e6, 4.09e9, 54), (vgg16, 138.34e6, 15.47e9, 16)]
)
def test_published_figures(network, parameters, macs, layers):
    counted = network()
    assert len(counted) == layers
    assert sum(layer.parameters for layer in counted) == pytest.approx(parameters, rel=1e-3)
    assert sum(layer.macs for layer in counted) == pytest.approx(macs, rel=2e-3)

"""Evaluations: pure functions from a model, data and a protocol to figures and pictures.

This package imports nothing on its own: take what you need from its modules, e.g.
`from dbae.evaluation.metrics import ssim`.
"""

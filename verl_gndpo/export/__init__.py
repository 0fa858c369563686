# SPDX-License-Identifier: Apache-2.0
"""Turns a checkpoint of verl into a Hugging Face folder: `verl-gndpo export`.

`folders` finds the checkpoint, `shards` reads its weights, `weights` makes a model of them and writes it, `comparison`
compares what was written with what was trained, `card` describes it, and `command` puts these steps in order.
"""

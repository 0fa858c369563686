# SPDX-License-Identifier: Apache-2.0
"""Convert published data sets to verl's parquet: one plain script per data set, and `mix` to join them.

In an installed wheel this folder is the package `verl_gndpo.data_prep`.
"""

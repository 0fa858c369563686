# SPDX-License-Identifier: Apache-2.0
"""Converters from published data sets to verl's parquet, one plain script a data set on one shared core."""

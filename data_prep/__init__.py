"""From GeoTIFF trees to ArrayRecord data sets."""

"""From detections to the metrics of the paper: recall, AP, mAP, top-k."""

"""From detections to the figures of the paper: recall, AP, mAP, top-k."""

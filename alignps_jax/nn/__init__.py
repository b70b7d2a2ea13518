"""The network: backbone, neck (AFA), head."""

"""
Wyoming, the protocol of Home Assistant's voice services, over the same models as HTTP.

The extra ``[wyoming]`` brings the package that knows its events; what is read from
clients is read here, with limits.
"""

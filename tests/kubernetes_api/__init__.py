"""A small Kubernetes API over a real socket, with KubeRay's definitions and its operator.

server      KubernetesApi: requests, users and rights, watches, logs of pods, faults
objects     what is in the cluster: versions, owners of fields, finalizers, expired versions
schemas     KubeRay's and Kueue's own definitions: unknown fields, wrong values, defaults
operator    KubeRay's state machine, as all that may come next, and as somebody who plays it
"""

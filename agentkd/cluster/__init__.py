"""Collection on a cluster: the shards of one run, each collected where Ray has room for it.

Every shard is an ordinary collection (:func:`agentkd.collect.collect`) on some node. What it has
finished is copied to a store that all nodes reach, every few seconds; when a node is lost, Ray
starts the shard on another one, which goes on from the copy. In the end the shards are merged
(:func:`agentkd.merge.merge_runs`) into one run without duplicates.
"""

from agentkd.cluster.run import ClusterConfig, Clustered, collect_on_ray
from agentkd.cluster.store import Store

__all__ = ["ClusterConfig", "Clustered", "Store", "collect_on_ray"]

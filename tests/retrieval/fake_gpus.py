"""faiss's GPUs, for machines that have none."""

import threading
from types import SimpleNamespace

import faiss


class FakeGpus:
    """faiss's face for GPUs, over the CPU: a shard of the real index for each, and what real GPUs refuse."""

    def __init__(self, monkeypatch, count=2):
        self.searches, self.given, self.error = [], None, None
        self._busy = threading.Lock()
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: count)
        for name, stand_in in {
            "StandardGpuResources": lambda: SimpleNamespace(setTempMemory=lambda size: None),
            "GpuMultipleClonerOptions": SimpleNamespace,
            "index_cpu_to_gpu_multiple_py": self._copied,
        }.items():
            monkeypatch.setattr(faiss, name, stand_in, raising=False)

    def _copied(self, resources, index, options, numbers):
        assert options.shard
        assert len(resources) == len(numbers)
        self.given = numbers
        if self.error:
            raise RuntimeError(self.error)
        self._shards = faiss.IndexShards(index.d, True, False)
        for number in range(len(numbers)):
            if isinstance(index, faiss.IndexIVFPQ):
                sizes = (index.pq.M, index.pq.nbits)
                part = faiss.IndexIVFPQ(index.quantizer, index.d, index.nlist, *sizes, index.metric_type)
                part.pq = index.pq
            else:
                kind = index.sq.qtype
                part = faiss.IndexIVFScalarQuantizer(index.quantizer, index.d, index.nlist, kind, index.metric_type)
                part.sq = index.sq
            part.is_trained = True
            index.copy_subset_to(part, faiss.InvertedLists.SUBSET_TYPE_ID_MOD, len(numbers), number)
            self._shards.add_shard(part)
            part.this.disown()
        self._shards.own_indices = True
        return self

    def search(self, queries, k, *, params):
        assert self._busy.acquire(blocking=False), "two threads at once"
        try:
            if self.error:
                raise RuntimeError(self.error)
            if max(k, params.nprobe) > 2048:
                raise RuntimeError("Error: 'k <= 2048' failed: too many")
            self.searches.append((k, params.nprobe))
            return self._shards.search(queries, k, params=params)
        finally:
            self._busy.release()

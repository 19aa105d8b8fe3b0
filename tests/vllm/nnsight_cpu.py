"""nnsight's vLLM on a CPU: nnsight 0.8.1 knows vLLM's worker for GPUs only, of which that for CPUs is a subclass."""

from nnsight.modeling.vllm import VLLM
from nnsight.modeling.vllm.model_runners.GPUModelRunner import NNsightGPUModelRunner
from nnsight.modeling.vllm.workers.GPUWorker import NNsightGPUWorker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class NNsightCPUModelRunner(NNsightGPUModelRunner, CPUModelRunner):
    """nnsight's runner, on top of vLLM's for CPUs."""


class NNsightCPUWorker(CPUWorker):
    """vLLM's worker for CPUs, with what nnsight's adds to that for GPUs."""

    collect_nnsight = NNsightGPUWorker.collect_nnsight
    nnsight_request_count = NNsightGPUWorker.nnsight_request_count
    nnsight_register = NNsightGPUWorker.nnsight_register
    nnsight_clear_registered = NNsightGPUWorker.nnsight_clear_registered

    def init_device(self) -> None:
        """As vLLM's; then the runner becomes nnsight's."""
        super().init_device()
        assert type(self.model_runner) is CPUModelRunner
        self.model_runner.__class__ = NNsightCPUModelRunner


class CPUVLLM(VLLM):
    """nnsight's model, with that worker."""

    _WORKER_CLS = "nnsight_cpu.NNsightCPUWorker"

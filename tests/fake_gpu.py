"""A GPU and its host on a fake timeline, where the truth about every second is known: a driver for the device clock."""

from attn_impls.harness.clock import FIRST_CYCLES, Subject

MHZ = 1500.0
FIRST_SPIN = FIRST_CYCLES / MHZ / 1e6  # seconds
KERNEL = 20e-6


class FakeEvent:
    def __init__(self, gpu):
        self.gpu, self.at = gpu, None

    def record(self):
        self.at = self.gpu.enqueue(self.gpu.event_seconds)
        self.gpu.log.append("record")

    def query(self):
        return self.gpu.host >= self.at

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class FakeGpu:
    """A host and a device with one in-order queue. Everything the host enqueues costs it `launch` seconds."""

    def __init__(self, mhz=MHZ, launch=2e-6, event_seconds=0.0, empty_spin=0.0):
        self.mhz, self.launch, self.event_seconds, self.empty_spin = mhz, launch, event_seconds, empty_spin
        self.host = self.drained = 0.0  # now on the host; when the device's queue is empty
        self.log = []

    def enqueue(self, seconds):
        """Kernel of some device seconds; returns when it ends."""
        self.host += self.launch
        self.drained = max(self.drained, self.host) + seconds
        return self.drained

    def work(self, seconds):
        self.host += seconds

    def flush(self):
        self.log.append("flush")
        self.enqueue(30e-6)

    def spin(self, cycles, /):
        self.log.append(("spin", cycles))
        self.enqueue(self.empty_spin + cycles / self.mhz / 1e6)

    @property
    def spins(self):
        """The cycles of each spin that a call was enqueued behind."""
        rounds = [i for i, entry in enumerate(self.log) if entry == "flush"]
        prepared = ([x for x in self.log[i + 1 : i + 12] if x != ("spin", 0)][:3] for i in rounds)
        return [spin[1] for _lead, _event, spin in prepared]

    def synchronize(self):
        self.host = max(self.host, self.drained)

    def event(self):
        return FakeEvent(self)

    def host_time(self):
        return self.host

    def call(self, *parts):
        """A call of kernels (positive seconds) and of host work (negative ones), in order."""

        def run():
            for seconds in parts:
                self.enqueue(seconds) if seconds > 0 else self.work(-seconds)

        return run

    def item(self):
        """A call that waits for its own result."""
        self.enqueue(KERNEL)
        self.synchronize()
        self.work(1e-6)


def sample(clock, call):
    subject = Subject(call)
    clock.prepare(subject)
    return clock.sample(subject)

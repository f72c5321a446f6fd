"""The host driver at the limits of a process. Each test uses one up, so each runs in a process of its own."""

from __future__ import annotations

from support_drivers import assert_runs


def test_the_kernels_limit_on_mappings_is_a_typed_error() -> None:
    """Scattered pages meet vm.max_map_count as OutOfMemory with the driver whole; adjacent ones never meet it."""
    out = assert_runs("""
        from kvmem import _core
        from kvmem.errors import OutOfMemory
        limit = int(open("/proc/sys/vm/max_map_count").read())
        assert limit <= 1_000_000, "raise COUNT: this machine's limit is far above the default"
        driver = _core.host_driver()
        P = driver.info.granularity_bytes
        base = driver.reserve(1 << 40)
        pages = [driver.create(P) for _ in range(limit + 5000)]
        driver.map_run(base, P, pages)                       # adjacent: one mapping, however many pages
        driver.set_access(base, P * len(pages))
        driver.unmap_run(base, P, len(pages))
        assert sum(1 for _ in open("/proc/self/maps")) < limit // 2
        held = 0
        try:
            for page in pages:                               # each alone, with a gap: two mappings a page
                driver.map(base + 2 * P * held, P, 0, page)
                held += 1
        except OutOfMemory as error:
            assert "vm.max_map_count" in str(error) and "page_bytes" in str(error), error
        else:
            raise AssertionError("never refused")
        assert limit * 0.38 < held < limit * 0.41, held
        scattered = pages[::-2]
        try:
            driver.map_run(base + (1 << 39), P, scattered)   # a run that needs a mapping a page
        except OutOfMemory:
            pass
        else:
            raise AssertionError("a run was not refused")
        for i in range(held):                                # and everything can still be taken back
            driver.unmap(base + 2 * P * i, P)
        driver.map_run(base, P, pages)
        driver.set_access(base, P * len(pages))
        driver.zero(base, P)
        driver.unmap_run(base, P, len(pages))
        driver.release(base, 1 << 40)
        for page in pages:
            driver.destroy(page)
        print("ok", held)
    """)
    assert out.startswith("ok")


def test_unmapping_within_a_run_beyond_the_limit_is_a_typed_error() -> None:
    """Taking every second page out of one long run is refused before the kernel is so full that nothing unmaps."""
    out = assert_runs("""
        from kvmem import _core
        from kvmem.errors import OutOfMemory
        limit = int(open("/proc/sys/vm/max_map_count").read())
        driver = _core.host_driver()
        P = driver.info.granularity_bytes
        count = limit + 5000
        base = driver.reserve(count * P)
        pages = [driver.create(P) for _ in range(count)]
        driver.map_run(base, P, pages)
        driver.set_access(base, count * P)
        taken = []
        try:
            for i in range(1, count, 2):
                driver.unmap(base + i * P, P)
                taken.append(i)
        except OutOfMemory as error:
            assert "vm.max_map_count" in str(error), error
        else:
            raise AssertionError("never refused")
        failed = taken[-1] + 2
        _core.write_bytes(base + failed * P, b"still mapped")  # the failing call changed nothing
        last = (base + taken[-1] * P, P, 0, pages[taken[-1]])
        try:
            driver.map(*last)                                  # new mappings end far below
            raise AssertionError("not refused")
        except OutOfMemory as error:
            assert "80 % of vm.max_map_count" in str(error), error
        driver.undoing(True)                                   # but what was unmapped can come back
        driver.map(*last)
        driver.undoing(False)
        driver.unmap(base + taken[-1] * P, P)
        for i in range(0, taken[-1], 2):                       # what joins holes goes through
            driver.unmap(base + i * P, P)
        driver.unmap(base + failed * P, P)
        print("ok", len(taken))
    """)
    assert out.startswith("ok")


def test_two_drivers_share_one_count_of_mappings() -> None:
    out = assert_runs("""
        from kvmem import _core
        from kvmem.errors import OutOfMemory
        drivers = [_core.host_driver() for _ in range(2)]
        P = drivers[0].info.granularity_bytes
        bases = [driver.reserve(1 << 38) for driver in drivers]
        pages = [driver.create(P) for driver in drivers]
        limit, held = int(open("/proc/sys/vm/max_map_count").read()), 0
        try:
            while True:
                which = held % 2
                drivers[which].map(bases[which] + held * P, P, 0, pages[which])
                held += 1
        except OutOfMemory:
            assert limit * 0.38 < held < limit * 0.41, held
        del drivers[0]
        drivers[0].map(bases[1] + P * (1 << 20), P, 0, pages[1])  # the other's mappings are ours to use now
        print("ok")
    """)
    assert out.strip() == "ok"


def test_a_file_size_limit_is_a_typed_error() -> None:
    """RLIMIT_FSIZE would otherwise answer with SIGXFSZ."""
    out = assert_runs("""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        from kvmem import _core
        from kvmem.errors import OutOfMemory
        driver = _core.host_driver()
        pages = [driver.create(1 << 18) for _ in range(4)]
        try:
            driver.create(1 << 18)
        except OutOfMemory as error:
            assert "RLIMIT_FSIZE" in str(error)
            print("ok")
    """)
    assert out.strip() == "ok"

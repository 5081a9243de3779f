//! What the translator did, in numbers.

/// Counters of one code cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Blocks translated.
    pub blocks: u64,
    /// Guest instructions translated.
    pub insns: u64,
    /// Guest bytes translated.
    pub guest_bytes: u64,
    /// Bytes of host code made.
    pub host_bytes: u64,
    /// Blocks taken over from earlier runs; they are among the blocks, but their instructions are not counted.
    pub adopted: u64,
    /// Traces made; they are among the blocks.
    pub traces: u64,
    /// Jumps patched to their target.
    pub links: u64,
    /// Landings made.
    pub landings: u64,
    /// Blocks made stale by writes or changes of mappings.
    pub stale: u64,
    /// Times everything was thrown away.
    pub flushes: u64,
    /// Blocks that were there when they were looked for from outside the code.
    pub found: u64,
    /// Bytes of memory in use: code, metadata, and the table of branch targets ([`Store::memory`](crate::store::Store::memory)).
    pub memory: u64,
    /// Guest bytes of the code that is there.
    pub live_bytes: u64,
    /// Nanoseconds spent translating, if [`crate::Cache::count`] was called.
    pub nanoseconds: u64,
}

/// Counters of one virtual CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Times the cache was entered.
    pub entries: u64,
    /// Exits to a block not yet linked.
    pub to_block: u64,
    /// Exits because the target of an indirect branch was not found.
    pub misses: u64,
    /// Single steps of the interpreter.
    pub steps: u64,
    /// SYSCALLs it was left for.
    pub syscalls: u64,
    /// SYSCALLs carried out in it.
    pub direct: u64,
    /// Host exceptions in translated code.
    pub faults: u64,
    /// Writes to watched pages.
    pub code_writes: u64,
    /// Blocks that found their bytes changed.
    pub changes: u64,
    /// Accesses that were not in the inline TLB, and for which the code was left.
    pub tlb_misses: u64,
    /// Those that found their page in the guest's tables without that.
    pub walks: u64,
    /// Looks at the inline TLB that found the page, where that is measured; one may serve several accesses.
    pub tlb_hits: u64,
    /// Kicks and other signals.
    pub signals: u64,
}

impl Stats {
    /// Adds another virtual CPU's.
    pub fn add(&mut self, other: &Stats) {
        let Stats {
            entries,
            to_block,
            misses,
            steps,
            syscalls,
            direct,
            faults,
            code_writes,
            changes,
            tlb_misses,
            walks,
            tlb_hits,
            signals,
        } = other;
        self.entries += entries;
        self.to_block += to_block;
        self.misses += misses;
        self.steps += steps;
        self.syscalls += syscalls;
        self.direct += direct;
        self.faults += faults;
        self.code_writes += code_writes;
        self.changes += changes;
        self.tlb_misses += tlb_misses;
        self.walks += walks;
        self.tlb_hits += tlb_hits;
        self.signals += signals;
    }
}

//! When user code uses the mirror, and what its faults mean.

use super::{Next, System, by};
use crate::run::Translator;
use crate::system::area::{Area, at};
use crate::system::block::Access as GuestAccess;
use crate::system::lower::Flags;
use crate::system::mirror::{END, Mirror, Run, SLOT_BITS};
use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::mem::{Access, By, PAGE_SIZE, Ram, paging};
use bivisor_emulator::vcpu::Board;
use std::time::{Duration, Instant};

/// So long mappings must have stayed as they are where the mirror was not worth it.
const LONGEST: Duration = Duration::from_secs(1);
/// Faults that are always worth it; more must not come more often than one in [`SELDOM`].
const FREE: u32 = 1024;
const SELDOM: Duration = Duration::from_micros(200);

/// So long no page fault of the guest's must have come: while a program touches memory for the first time the inline TLB is cheaper.
const SETTLED: Duration = Duration::from_micros(20);
/// Page faults that come sooner one after the other, and end the use of the mirror.
const UNSETTLED: u32 = 8;

/// Pages that a fault looks at: as many as lie together in one aligned piece.
const AROUND: u64 = 64;

/// Whether user code uses the mirror.
pub(super) struct Mirroring {
    mirror: Option<Mirror>,
    on: bool,
    /// Since when mappings are as they are, or since when it is used.
    since: Instant,
    /// `None`: never.
    quiet: Option<Duration>,
    faults: u32,
    /// When the guest's last page fault in user mode was, and how many came soon after the one before.
    faulted: Option<Instant>,
    soon: u32,
    /// One has come since the clock was looked at, which is dear; the access is yet to be done again.
    unseen: bool,
    early: bool,
    /// What it was for, in the mirror: likely there when user code goes on.
    wanted: Option<u64>,
}

impl Mirroring {
    /// It is to be used when mappings have stayed as they are for `quiet`.
    pub(super) fn new(quiet: Option<Duration>) -> Mirroring {
        Mirroring {
            mirror: None,
            on: false,
            since: Instant::now(),
            quiet,
            faults: 0,
            faulted: None,
            soon: 0,
            unseen: false,
            early: false,
            wanted: None,
        }
    }

    /// The slots in use, as bits.
    pub(super) fn used(&self) -> u64 {
        self.mirror.as_ref().map_or(0, Mirror::used)
    }

    /// The usual ones that share a distance, as bits; and is the lowest at its own addresses?
    pub(super) fn usual(&self) -> (u64, bool) {
        self.mirror.as_ref().map_or((0, false), |m| (m.usual(), m.is_low()))
    }

    /// There may be one from now on, if the host and the RAM allow it.
    pub(super) fn prepare(&mut self, area: &Area, ram: &Ram) {
        if self.mirror.is_none() && self.quiet.is_some() && ram.file().is_some() {
            self.mirror = Mirror::new(area);
        }
    }

    /// Shall user code use it?
    #[inline]
    pub(super) fn decide(&mut self) -> bool {
        if !self.on
            && self.mirror.is_some()
            && let Some(quiet) = self.quiet
        {
            if std::mem::take(&mut self.early) && !quiet.is_zero() {
                return false;
            }
            let now = Instant::now();
            if std::mem::take(&mut self.unseen) {
                self.faulted = Some(now);
            }
            let settled = self.faulted.is_none_or(|at| now - at >= SETTLED.min(quiet));
            if settled && now - self.since >= quiet {
                (self.on, self.since, self.faults, self.soon) = (true, now, 0, 0);
            }
        }
        self.on
    }

    /// Mappings have changed: nothing is in the mirror. True if it was used.
    pub(super) fn clear(&mut self) -> bool {
        if let Some(m) = self.mirror.as_mut().filter(|m| !m.is_empty()) {
            m.clear();
        }
        self.since = Instant::now();
        std::mem::take(&mut self.on)
    }

    pub(super) fn clear_page(&mut self, laddr: u64) {
        if let Some(m) = &mut self.mirror {
            m.clear_page(laddr);
        }
    }

    pub(super) fn forbid_stores(&mut self, gpa: u64) {
        if let Some(m) = &mut self.mirror {
            m.forbid_stores(gpa);
        }
    }

    /// User code has met a page fault of the guest's. True if there are so many that the mirror is given up until they end.
    pub(super) fn page_fault(&mut self) -> bool {
        if !self.on {
            (self.unseen, self.early) = (true, true);
            return false;
        }
        let now = Instant::now();
        let soon = self.faulted.replace(now).is_some_and(|at| now - at < SETTLED);
        self.soon = if soon { self.soon + 1 } else { 0 };
        let unsettled = self.soon >= UNSETTLED && self.quiet.is_some_and(|quiet| !quiet.is_zero());
        self.on &= !unsettled;
        unsettled
    }

    /// Counts a fault. True if there are so many that the mirror is given up for a while.
    fn fault(&mut self) -> bool {
        self.faults += 1;
        let give_up = self.faults > FREE && self.since.elapsed() < self.faults * SELDOM;
        if give_up {
            (self.on, self.since) = (false, Instant::now());
            self.quiet = self.quiet.map(|quiet| (4 * quiet).clamp(Duration::from_millis(1), LONGEST));
        }
        give_up
    }
}

/// What surroundings a mapping depends on.
type Tables<'a> = (&'a CpuState, Board<'a>, &'a Ram);

/// The page of `at` as far as the guest's tables need no change for it, if it is not in the mirror: for loads if it has been loaded from
/// before, and for stores too if it has been stored to.
fn known(mirror: &Mirror, (cpu, board, ram): Tables<'_>, at: u64) -> Option<Run> {
    let page = paging::peek(cpu, board.mem, at)?;
    let may = |access| paging::allowed(cpu, &page, access, By::User);
    let write = page.dirty && may(Access::Write) && !ram.store_needs_care(page.gpa);
    let fits = page.accessed && may(Access::Read) && ram.contains(page.gpa);
    (fits && !mirror.has(at, page.gpa, write)).then_some(Run { laddr: at, gpa: page.gpa, count: 1, write })
}

/// Maps what lies around `laddr`.
fn map_around(mirror: &mut Mirror, area: &Area, tables: Tables<'_>, laddr: u64) {
    let start = laddr & !(AROUND * PAGE_SIZE - 1);
    let mut run: Option<Run> = None;
    for at in (0..AROUND).map(|n| start + n * PAGE_SIZE) {
        let next = known(mirror, tables, at);
        match (&mut run, next) {
            (Some(r), Some(n)) if n == (Run { laddr: r.laddr + r.bytes(), gpa: r.gpa + r.bytes(), count: 1, ..*r }) => {
                r.count += 1;
            }
            (_, next) => {
                if let Some(r) = std::mem::replace(&mut run, next) {
                    mirror.map(area, tables.2, r);
                }
            }
        }
    }
    if let Some(r) = run {
        mirror.map(area, tables.2, r);
    }
}

impl System {
    /// Mappings have changed.
    pub(super) fn clear_mirror(&mut self) {
        if self.mirroring.clear() {
            self.close_gates();
        }
    }

    /// After a fault of the host at `pc`, in an access to the mirror: maps what the guest may access. `None`: the interpreter does the
    /// instruction, whose access is given back.
    pub(super) fn fill_mirror(
        &mut self,
        t: &mut Translator,
        board: Board<'_>,
        ram: &Ram,
        pc: u64,
        access: &GuestAccess,
    ) -> Option<Next> {
        let laddr = access.address(|r| t.cpu.gpr[r as usize], self.area.get(at::FS_BASE), self.area.get(at::GS_BASE));
        if let Some(check) = self.cache.point(pc).and_then(|(_, point)| point.checks) {
            if let (Some(r), true) = (check.of, check.early) {
                let next = self.again(t, board, pc);
                self.cache.not_early(pc, r);
                return Some(next);
            }
            let looked_at = check.of.map_or(laddr, |r| t.cpu.gpr[r as usize]);
            if looked_at >= END {
                return None;
            }
            let next = self.again(t, board, pc);
            self.cache.astray(pc, (looked_at >> SLOT_BITS) as u8);
            return Some(next);
        }
        if self.mirroring.fault() {
            self.close_gates();
            return Some(self.again(t, board, pc));
        }
        let last = laddr.checked_add(u64::from(access.len) - 1).filter(|last| *last < END)?;
        if last >> 32 != 0 && t.cpu.mode() != bivisor_emulator::cpu::Mode::Long64 {
            // A sum that wraps.
            return None;
        }
        let kind = if access.write { Access::Write } else { Access::Read };
        let mut progress = false;
        for at in [Some(laddr), (laddr / PAGE_SIZE != last / PAGE_SIZE).then_some(last)].into_iter().flatten() {
            let Ok(gpa) = t.core.mmu.translate(&t.cpu, board.mem, at, kind, by(&t.cpu)) else {
                self.mirroring.wanted = Some(at);
                // For `map_wanted` the way back must be the interpreter's.
                self.area.set(at::IRET, 0);
                if self.mirroring.page_fault() {
                    self.close_gates();
                }
                return None;
            };
            let mirror = self.mirroring.mirror.as_mut()?;
            if access.write && ram.store_needs_care(gpa) {
                return None;
            }
            let run = Run { laddr: at, gpa, count: 1, write: access.write };
            if mirror.map(&self.area, ram, run) {
                progress = true;
                map_around(mirror, &self.area, (&t.cpu, board, ram), at);
            }
        }
        if !progress {
            let base = access.base.map_or(0, |r: Gpr| t.cpu.gpr[r as usize]);
            if access.based().is_some() && base >> SLOT_BITS != laddr >> SLOT_BITS {
                self.cache.distant(pc);
            }
            return None;
        }
        let (_, point) = self.cache.point(pc)?;
        if point.flags == Flags::Host {
            self.area.set(at::STATUS, self.area.get(at::EXIT_STATUS));
        }
        Some(Next::Resume(pc))
    }

    /// Before user code goes on in the mirror: maps what it met a page fault for, if that is there now.
    pub(super) fn map_wanted(&mut self, t: &Translator, board: Board<'_>, ram: &Ram) {
        if let Some(at) = self.mirroring.wanted.take()
            && let Some(mirror) = &mut self.mirroring.mirror
            && let Some(run) = known(mirror, (&t.cpu, board, ram), at)
        {
            mirror.map(&self.area, ram, run);
        }
    }

    /// The state as it was before the instruction that faulted at `pc`.
    pub(super) fn again(&self, t: &mut Translator, board: Board<'_>, pc: u64) -> Next {
        let (block, point) = self.cache.point(pc).expect("the host faults only where it may");
        t.cpu.rip = block.rip.wrapping_add(u64::from(point.at));
        self.mend(&mut t.cpu, board, point.spilled, point.flags, point.told);
        Next::Go(super::Via::Start)
    }
}

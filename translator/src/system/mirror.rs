//! The mirror: pages of the guest's user mode mapped on the host as far apart as in the guest, so that the host's MMU checks accesses
//! instead of the inline TLB.
//!
//! User addresses have 47 bits, the host's too, so a constant distance does not do: each 2 TiB that the guest uses (a slot) has a place
//! of its own on the host, with 64 GiB on either side where nothing is. Generated code takes bits 41 to 48 of an address to find the
//! distance in a table ([`at::DELTAS`]) and adds it. Slots that are not used lead nowhere: to a place where nothing is ever mapped. An
//! address with other bits set has a sum that is not canonical. So each access hits a page that is mirrored, or faults.
//!
//! To wait for the table makes each step along a list twice as long. So where it can be guessed which slot an address is in, its distance
//! is loaded without the address, and a load beside it makes sure ([`area::CHECKED`]): bits 32 to 47 of the address lead it to
//! the one page that is readable, or, if the slot is another, to one that is not.
//!
//! The slots where Linux has position-independent programs, libraries and stacks ([`USUAL`]) have one distance, which is FS base while
//! translated code runs: an access there is the guest's own with another segment. It still only follows where its base register is known
//! to be in one of them, or in the empty space beside: because a load made sure ([`area::USUALLY`]), because an access near by did not fault,
//! or because all that jump past the load know it.
//!
//! The lowest slot is at its own addresses, where the host has nothing else there: accesses there are the guest's own, likewise only where
//! the register is known. The empty space below it is that of the host's kernel, and pages that nobody may map.
//!
//! A fault maps the page if the guest may access it, for loads, or for stores too if its dirty flag is set and no store there needs care,
//! and those around it that the guest has accessed before. Whatever takes pages from the inline TLB takes them from here. A fault costs
//! some microseconds, so only code of address spaces that have not changed for a while uses the mirror ([`Mode`](super::Mode)).
#![allow(unsafe_code)]

#[cfg(doc)]
use crate::system::area;
use crate::system::area::{Area, at};
use crate::system::hash::Map;
use bivisor_emulator::host::reserved::Reserved;
use bivisor_emulator::mem::{PAGE_SIZE, Ram};
use std::collections::HashMap;
use std::os::fd::AsRawFd;

/// Address bits of a slot.
pub const SLOT_BITS: u32 = 41;
/// Slots there can be: bits 41 to 46.
pub const SLOTS: usize = 64;
/// Entries of the table of distances: two bits more, which user addresses have not.
const ROWS: usize = 256;
const SLOT: u64 = 1 << SLOT_BITS;
/// Bytes on either side of a slot that stay empty: more than displacements, what is added to a base register in a block, and eight times an
/// index of 32 bits can reach.
const GUARD: u64 = 64 << 30;
/// The slots that share a distance, as bits: a Linux kernel loads position-independent programs at two thirds of the address space and up
/// to 1 TiB above, and maps libraries and stacks within 1 TiB of its end.
pub const USUAL: u64 = 1 << 42 | 1 << 43 | 1 << 63;
/// What may be added to a base register before its distance is looked up anew; with a displacement and an index it stays within the
/// empty space on either side.
pub const REACH: i64 = 1 << 30;
/// An index is between -2^31 and 2^32, a displacement has 32 bits.
const _: () = assert!((8 << 32) + REACH as u64 + (1 << 31) + 4096 < GUARD);
/// How far from a usual slot a register may be that is known to be there from one block to the next.
pub const NEAR: i64 = 1 << 20;
/// What is known to be near may have been added to an index without a fault being met.
const _: () = assert!((8 << 32) + 2 * REACH as u64 + 2 * NEAR as u64 + (1 << 31) + 4096 < GUARD);
/// User addresses end here.
pub const END: u64 = 1 << 47;
/// The host maps nothing below (vm.mmap_min_addr), and below 0 there are its kernel's addresses.
const LEAST: u64 = 0x1_0000;
/// Slots that are used at most.
const MOST_SLOTS: usize = 8;
/// Pages at most: each may be a mapping of its own, of which a process can have 65,530.
const MOST_PAGES: usize = 16384;

/// A slot in use: its host address, and the range of its pages that may be mapped.
#[derive(Debug)]
struct Slot {
    number: u64,
    host: u64,
    low: u64,
    high: u64,
    /// Has it ever had a page?
    met: bool,
}

/// Pages that lie one behind the other in linear and in guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// An address in the first.
    pub laddr: u64,
    /// Its guest-physical address.
    pub gpa: u64,
    /// How many.
    pub count: u64,
    /// To be stored to as well?
    pub write: bool,
}

impl Run {
    /// In bytes.
    pub fn bytes(&self) -> u64 {
        self.count * PAGE_SIZE
    }
}

/// The mirror of one virtual CPU.
#[derive(Debug)]
pub struct Mirror {
    nowhere: u64,
    slots: Vec<Slot>,
    /// The usual slots that have one distance: all of them, or none.
    usual: u64,
    /// Address space that is taken.
    reserved: Vec<Reserved>,
    /// By linear page: guest-physical page, and whether it may be stored to.
    pages: Map<u64, (u64, bool)>,
}

/// The one page of the kernel's addresses that programs can see, unless the kernel was told otherwise only to execute it.
fn vsyscall_is_readable() -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps");
    maps.map_or(true, |m| m.lines().any(|l| l.ends_with("[vsyscall]") && l.contains(" r")))
}

/// Takes address space for a slot.
fn reserve_slot() -> Option<Reserved> {
    Reserved::anywhere((SLOT + 2 * GUARD) as usize, PAGE_SIZE as usize).ok()
}

/// Takes address space for the usual slots; gives their distance, and what was taken.
fn reserve_usual() -> Option<(u64, Vec<Reserved>)> {
    // Host addresses where nothing is by custom: away from where the host has programs, libraries and stacks itself.
    let distances = (20..40).map(|n| (n * SLOT).wrapping_neg());
    distances.into_iter().find_map(|distance| {
        let mut taken = Vec::new();
        let first = |n: &u64| USUAL >> n & 1 != 0 && USUAL >> (n - 1) & 1 == 0;
        for n in (1..SLOTS as u64).filter(first) {
            let slots = (USUAL >> n).trailing_ones() as u64;
            let at = (n * SLOT).wrapping_add(distance) - GUARD;
            taken.push(Reserved::at(at as usize, (slots * SLOT + 2 * GUARD) as usize).ok()?);
        }
        Some((distance, taken))
    })
}

impl Mirror {
    /// Empty; `None` if the host cannot have one.
    pub fn new(area: &Area) -> Option<Mirror> {
        if !std::is_x86_feature_detected!("bmi2") {
            return None;
        }
        let nowhere = reserve_slot()?;
        let mut mirror = Mirror {
            nowhere: nowhere.start() as u64 + GUARD,
            slots: Vec::new(),
            usual: 0,
            reserved: vec![nowhere],
            pages: HashMap::default(),
        };
        for n in 0..ROWS as u64 {
            area.set(at::DELTAS + 8 * n as usize, mirror.nowhere.wrapping_sub(n << SLOT_BITS));
        }
        // Only one mirror can have that.
        if !vsyscall_is_readable()
            && let Ok(taken) = Reserved::at(LEAST as usize, (SLOT + GUARD - LEAST) as usize)
        {
            mirror.add(area, 0, 0);
            mirror.reserved.push(taken);
        }
        if let Some((distance, taken)) = reserve_usual() {
            for number in (0..SLOTS as u64).filter(|n| USUAL >> n & 1 != 0) {
                mirror.add(area, number, (number << SLOT_BITS).wrapping_add(distance));
            }
            mirror.reserved.extend(taken);
            mirror.usual = USUAL;
            area.set(at::DISTANCE, distance);
        }
        Some(mirror)
    }

    fn add(&mut self, area: &Area, number: u64, host: u64) {
        area.set(at::DELTAS + 8 * number as usize, host.wrapping_sub(number << SLOT_BITS));
        self.slots.push(Slot { number, host, low: u64::MAX, high: 0, met: false });
    }

    /// Is the lowest slot at its own addresses?
    pub fn is_low(&self) -> bool {
        self.slots.iter().any(|s| s.number == 0 && s.host == 0)
    }

    /// The slots, as bits, whose distance is FS base.
    pub fn usual(&self) -> u64 {
        self.usual
    }

    /// The slots in use, as bits.
    pub fn used(&self) -> u64 {
        self.slots.iter().filter(|s| s.met).fold(0, |m, s| m | 1 << s.number)
    }

    /// Is nothing mapped?
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    fn slot(&mut self, area: &Area, number: u64) -> Option<&mut Slot> {
        if let Some(n) = self.slots.iter().position(|s| s.number == number) {
            return self.slots.get_mut(n);
        }
        if self.slots.len() == MOST_SLOTS {
            return None;
        }
        let taken = reserve_slot()?;
        self.add(area, number, taken.start() as u64 + GUARD);
        self.reserved.push(taken);
        self.slots.last_mut()
    }

    /// Is the page of `laddr` there as guest-physical `gpa`, also for stores if they are asked for?
    pub fn has(&self, laddr: u64, gpa: u64, write: bool) -> bool {
        let (page, to) = (laddr & !(PAGE_SIZE - 1), gpa & !(PAGE_SIZE - 1));
        self.pages.get(&page).is_some_and(|(old, writable)| *old == to && (*writable || !write))
    }

    /// Maps `count` pages from that of `laddr`, which are one behind the other from guest-physical `gpa`, in one slot. False: the first was
    /// there already, or they cannot be.
    pub fn map(&mut self, area: &Area, ram: &Ram, run: Run) -> bool {
        let Run { laddr, gpa, count, write } = run;
        let (page, to, len) = (laddr & !(PAGE_SIZE - 1), gpa & !(PAGE_SIZE - 1), run.bytes());
        if self.has(page, to, write) || page + len > END || !ram.contains(to) || !ram.contains(to + len - PAGE_SIZE) {
            return false;
        }
        let Some(file) = ram.file().map(AsRawFd::as_raw_fd) else { return false };
        if self.pages.len() + count as usize > MOST_PAGES {
            self.clear();
        }
        let Some(slot) = self.slot(area, page >> SLOT_BITS) else { return false };
        let offset = page % SLOT;
        if offset + len > SLOT {
            return false;
        }
        let host = slot.host + offset;
        if host < LEAST {
            return false;
        }
        (slot.low, slot.high, slot.met) = (slot.low.min(offset), slot.high.max(offset + len), true);
        let prot = if write { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        // SAFETY: inside a reservation of our own, over which nothing in Rust has a reference.
        let p = unsafe { libc::mmap(host as *mut _, len as usize, prot, flags, file, to as libc::off_t) };
        if p == libc::MAP_FAILED {
            // Too many mappings: what was there before is there no more, or unchanged.
            self.clear();
            return false;
        }
        self.pages.extend((0..count).map(|n| n * PAGE_SIZE).map(|n| (page + n, (to + n, write))));
        true
    }

    /// Takes all pages away.
    pub fn clear(&mut self) {
        for slot in self.slots.iter_mut().filter(|s| s.high > 0) {
            empty(slot.host + slot.low, slot.high - slot.low);
            (slot.low, slot.high) = (u64::MAX, 0);
        }
        self.pages.clear();
    }

    /// Takes one page away.
    pub fn clear_page(&mut self, laddr: u64) {
        let page = laddr & !(PAGE_SIZE - 1);
        if self.pages.remove(&page).is_some()
            && let Some(slot) = self.slots.iter().find(|s| s.number == page >> SLOT_BITS)
        {
            empty(slot.host + page % SLOT, PAGE_SIZE);
        }
    }

    /// From now on stores to the physical page of `gpa` need care.
    pub fn forbid_stores(&mut self, gpa: u64) {
        let to = gpa & !(PAGE_SIZE - 1);
        let hit: Vec<u64> = self.pages.iter().filter(|(_, v)| **v == (to, true)).map(|(page, _)| *page).collect();
        hit.into_iter().for_each(|page| self.clear_page(page));
    }
}

fn empty(host: u64, len: u64) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: inside a reservation of our own, over which nothing in Rust has a reference.
    let p = unsafe { libc::mmap(host as *mut _, len as usize, libc::PROT_NONE, flags, -1, 0) };
    assert!(p != libc::MAP_FAILED, "mappings can be taken away: {}", std::io::Error::last_os_error());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a byte as generated code would; the pages are known to be there.
    fn read(area: &Area, laddr: u64) -> u8 {
        let delta = area.get(at::DELTAS + 8 * (laddr >> SLOT_BITS) as usize);
        // SAFETY: the test mapped the page.
        unsafe { (laddr.wrapping_add(delta) as *const u8).read_volatile() }
    }

    #[test]
    fn pages_show_guest_ram_until_they_are_taken_away() {
        let ram = Ram::shared(4 * PAGE_SIZE).expect("memory");
        let area = Area::new().expect("memory");
        let Some(mut mirror) = Mirror::new(&area) else {
            println!("SKIPPED: the host has no BMI2");
            return;
        };
        for n in 0..4 {
            ram.write(n * PAGE_SIZE + 5, &[n as u8 + 1]).expect("RAM");
        }
        let map = |m: &mut Mirror, laddr, gpa, count, write| m.map(&area, &ram, Run { laddr, gpa, count, write });
        let high = 0x7fff_ffff_f000;
        assert!(map(&mut mirror, 0x10_1000, 0x2000, 1, true));
        assert!(map(&mut mirror, high + 7, PAGE_SIZE, 1, false));
        assert_eq!((read(&area, 0x10_1005), read(&area, high + 5)), (3, 2));
        assert!(!map(&mut mirror, 0x10_1000, 0x2000, 1, false), "it is there");
        assert!(map(&mut mirror, 0x10_1000, 0x3000, 1, false), "another physical page");
        assert_eq!(read(&area, 0x10_1005), 4);
        assert!(!map(&mut mirror, 0x10_9000, 4 * PAGE_SIZE, 1, false), "no RAM");
        assert!(!map(&mut mirror, END, 0, 1, false), "no user address");
        assert!(map(&mut mirror, 0x10_5000, 0, 1, true));
        mirror.forbid_stores(0);
        assert!(map(&mut mirror, 0x10_5000, 0, 1, false), "taken away, to be loaded from again");
        mirror.clear_page(high);
        assert!(map(&mut mirror, high, 0, 1, false));
        assert_eq!(read(&area, high + 5), 1);
        assert!(map(&mut mirror, 0x10_8000, 0x1000, 3, true), "three at once");
        assert_eq!((read(&area, 0x10_8005), read(&area, 0x10_9005), read(&area, 0x10_a005)), (2, 3, 4));
        mirror.clear_page(0x10_9000);
        assert!(mirror.has(0x10_8000, 0x1000, true) && !mirror.has(0x10_9000, 0x2000, false));
        assert!(!map(&mut mirror, 0x10_b000, 0x2000, 3, false), "the last of them is no RAM");
        mirror.clear();
        assert!(mirror.is_empty());
    }

    #[test]
    fn no_sum_reaches_the_hosts_memory() {
        let area = Area::new().expect("memory");
        let Some(mirror) = Mirror::new(&area) else {
            println!("SKIPPED: the host has no BMI2");
            return;
        };
        for number in 0..ROWS as u64 {
            let delta = area.get(at::DELTAS + 8 * number as usize);
            // All values of the bits that choosing the slot ignores, and both ends of it.
            for (above, low) in (0..1 << 15).flat_map(|above: u64| [(above, 0), (above, SLOT - 1)]) {
                let sum = (above << 49 | number << SLOT_BITS | low).wrapping_add(delta);
                let slot = mirror.slots.iter().find(|s| s.number == number);
                let start = slot.map_or(mirror.nowhere, |s| s.host);
                let inside = (start..start + SLOT).contains(&sum);
                assert_eq!(inside, above == 0, "{sum:#x}");
                // Bit 47 differs from those above, or the address is the kernel's.
                assert!(inside || sum >> 47 != 0);
            }
        }
    }

    #[test]
    fn only_usual_slots_pass_and_have_one_distance() {
        let mut area = Area::new().expect("memory");
        let Some(mirror) = Mirror::new(&area) else {
            println!("SKIPPED: the host has no BMI2");
            return;
        };
        if mirror.usual() == 0 {
            println!("SKIPPED: no room for the usual slots");
            return;
        }
        let block = bivisor_emulator::host::thread::ThreadBlock::current();
        area.map(block).expect("memory");
        let start = std::ptr::from_ref(block) as u64 + bivisor_emulator::host::thread::ENGINE_AREA_OFFSET as u64;
        let mapped = |at: u64, rights: &str| {
            let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
            maps.lines().any(|l| {
                let (range, rest) = l.split_once(' ').expect("a line");
                let (from, to) = range.split_once('-').expect("a range");
                let n = |s| u64::from_str_radix(s, 16).expect("an address");
                (n(from)..n(to)).contains(&at) && rest.starts_with(rights)
            })
        };
        let distance = area.get(at::DISTANCE);
        // Bits 41 to 47 of any address choose a page, and those above make no difference.
        for number in 0..2 * SLOTS as u64 {
            let usual = number < SLOTS as u64 && USUAL >> number & 1 != 0;
            let page = start + crate::system::area::USUALLY as u64 + 4096 * number;
            assert_eq!(mapped(page, "r"), usual, "{number}");
            assert_eq!(mapped(page, "---"), !usual, "{number}");
            if usual {
                let slot = number << SLOT_BITS;
                assert_eq!(area.get(at::DELTAS + 8 * number as usize), distance);
                for at in [slot.wrapping_sub(GUARD), slot, slot + SLOT - 1, slot + SLOT + GUARD - 1] {
                    let at = at.wrapping_add(distance);
                    assert!(at >> 47 == 0 && mapped(at, "---"), "{at:#x}");
                    // Not canonical, wherever the bits above are.
                    assert!((1..1 << 16).all(|above: u64| (above << 48).wrapping_add(at) >> 47 != 0));
                }
            }
        }
        area.unmap();
    }
}

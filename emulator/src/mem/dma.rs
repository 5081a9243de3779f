//! RAM for devices that read and write it by themselves: the rust-vmm view of it, which checks each range and tells of each write, so that code
//! cached from there becomes stale.
#![allow(unsafe_code)]

use crate::mem::{PAGE_SIZE, Ram};
use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::region::GuestMemoryRegionBytes;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestUsize, MemoryRegionAddress,
    VolatileSlice,
};

/// The marks of RAM from an address on.
#[derive(Clone)]
pub struct Marks<'a> {
    ram: &'a Ram,
    from: u64,
}

impl std::fmt::Debug for Marks<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Marks from {:#x}", self.from)
    }
}

impl<'a> WithBitmapSlice<'a> for Marks<'_> {
    type S = Self;
}

impl BitmapSlice for Marks<'_> {}

impl Bitmap for Marks<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let Some(last) = (len as u64).checked_sub(1) else { return };
        let first = self.from + offset as u64;
        // Only ranges that were checked get here; what is not RAM is ignored all the same.
        let end = first.saturating_add(last).min(self.ram.size() - 1);
        for page in first / PAGE_SIZE..=end / PAGE_SIZE {
            self.ram.wrote(page * PAGE_SIZE);
        }
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        Marks { ram: self.ram, from: self.from + offset as u64 }
    }
}

impl<'a> WithBitmapSlice<'a> for Ram {
    type S = Marks<'a>;
}

impl Bitmap for Ram {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Marks<'_> {
        Marks { ram: self, from: offset as u64 }
    }
}

impl GuestMemoryRegionBytes for Ram {}

impl GuestMemoryRegion for Ram {
    type B = Ram;

    fn len(&self) -> GuestUsize {
        self.size()
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(0)
    }

    fn bitmap(&self) -> BS<'_, Ram> {
        self.slice_at(0)
    }

    fn get_slice(&self, at: MemoryRegionAddress, len: usize) -> Result<VolatileSlice<'_, Marks<'_>>, GuestMemoryError> {
        if self.reach(at.0, len as u64).is_none() && !(len == 0 && at.0 <= self.size()) {
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(at.0)));
        }
        // SAFETY: the range is inside the mapping, which lives as long as `self`; everybody else uses raw accesses too.
        Ok(unsafe {
            VolatileSlice::with_bitmap(self.host_base().add(at.0 as usize), len, self.slice_at(at.0 as usize), None)
        })
    }
}

impl GuestMemoryBackend for Ram {
    type R = Ram;

    fn iter(&self) -> impl Iterator<Item = &Ram> {
        std::iter::once(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemory, Permissions};

    #[test]
    fn what_a_device_writes_makes_code_stale() {
        let ram = Ram::new(4 * PAGE_SIZE).expect("16 KiB");
        ram.watch_code(PAGE_SIZE);
        ram.watch_code(3 * PAGE_SIZE);
        let generations = || [PAGE_SIZE, 3 * PAGE_SIZE].map(|at| ram.code_generation(at));
        assert_eq!(generations(), [0, 0]);
        Bytes::write_slice(&ram, &[1; 2], GuestAddress(PAGE_SIZE - 1)).expect("inside");
        assert_eq!(generations(), [1, 0]);
        let slice =
            GuestMemoryRegion::get_slice(&ram, MemoryRegionAddress(8), 4 * PAGE_SIZE as usize - 8).expect("inside");
        slice.subslice(2 * PAGE_SIZE as usize, 0x1000).expect("inside").copy_from(&[1u8; 0x1000]);
        assert_eq!(generations(), [1, 1]);
    }

    #[test]
    fn outside_is_an_error() {
        let ram = Ram::new(2 * PAGE_SIZE).expect("8 KiB");
        let mut b = [0; 16];
        for at in [2 * PAGE_SIZE - 8, 2 * PAGE_SIZE, u64::MAX - 3] {
            assert!(Bytes::read_slice(&ram, &mut b, GuestAddress(at)).is_err(), "{at:#x}");
            assert!(Bytes::write_slice(&ram, &b, GuestAddress(at)).is_err(), "{at:#x}");
            assert!(!GuestMemory::check_range(&ram, GuestAddress(at), 16, Permissions::Read));
        }
        let ram = Ram::with_hole(PAGE_SIZE, PAGE_SIZE).expect("sparse");
        for (at, there) in
            [(0, true), (PAGE_SIZE - 8, false), (PAGE_SIZE, false), ((1 << 32) - 8, false), (1 << 32, true)]
        {
            assert_eq!(Bytes::write_slice(&ram, &b, GuestAddress(at)).is_ok(), there, "{at:#x}");
            assert_eq!(Bytes::read_slice(&ram, &mut b, GuestAddress(at)).is_ok(), there, "{at:#x}");
        }
        assert!(GuestMemoryRegion::get_slice(&ram, MemoryRegionAddress(u64::MAX), 2).is_err());
    }
}

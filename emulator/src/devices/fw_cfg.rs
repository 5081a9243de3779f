//! The firmware configuration device of QEMU's PCs: a selector and a stream of bytes (docs/specs/fw_cfg in its documentation).

use std::collections::BTreeMap;

/// Selectors of fixed items.
#[allow(missing_docs)]
pub mod key {
    pub const SIGNATURE: u16 = 0;
    pub const ID: u16 = 1;
    pub const RAM_SIZE: u16 = 3;
    pub const NB_CPUS: u16 = 5;
    pub const MAX_CPUS: u16 = 0xf;
    pub const FILE_DIR: u16 = 0x19;
    pub const FIRST_FILE: u16 = 0x20;
}

/// The device.
#[derive(Clone, Debug, Default)]
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    names: Vec<(String, u32, u16)>,
    selected: u16,
    at: usize,
}

impl FwCfg {
    /// With its signature and no items.
    pub fn new() -> FwCfg {
        let mut f = FwCfg::default();
        f.set(key::SIGNATURE, b"QEMU");
        f.set(key::ID, &1u32.to_le_bytes());
        f.set(key::FILE_DIR, &0u32.to_be_bytes());
        f
    }

    /// Sets a fixed item.
    pub fn set(&mut self, key: u16, bytes: &[u8]) {
        self.items.insert(key, bytes.to_vec());
    }

    /// Adds a file under a name of at most 55 bytes.
    pub fn add_file(&mut self, name: &str, bytes: &[u8]) {
        let selector = key::FIRST_FILE + self.names.len() as u16;
        self.items.insert(selector, bytes.to_vec());
        self.names.push((name.to_owned(), bytes.len() as u32, selector));
        self.names.sort();
        let mut dir = (self.names.len() as u32).to_be_bytes().to_vec();
        for (name, size, selector) in &self.names {
            dir.extend(size.to_be_bytes());
            dir.extend(selector.to_be_bytes());
            dir.extend([0; 2]);
            let mut field = [0; 56];
            let n = name.len().min(55);
            field[..n].copy_from_slice(&name.as_bytes()[..n]);
            dir.extend(field);
        }
        self.set(key::FILE_DIR, &dir);
    }

    /// Selects an item and starts at its beginning.
    pub fn select(&mut self, key: u16) {
        self.selected = key;
        self.at = 0;
    }

    /// The next byte of the item; 0 past its end.
    pub fn read(&mut self) -> u8 {
        let byte = self.items.get(&self.selected).and_then(|b| b.get(self.at)).copied().unwrap_or(0);
        self.at = self.at.saturating_add(1);
        byte
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_and_files() {
        let mut f = FwCfg::new();
        f.set(key::RAM_SIZE, &0x0800_0000u64.to_le_bytes());
        f.select(key::RAM_SIZE);
        let bytes: Vec<u8> = (0..9).map(|_| f.read()).collect();
        assert_eq!(bytes, [0, 0, 0, 8, 0, 0, 0, 0, 0]);
        f.add_file("etc/e820", &[7; 20]);
        f.select(key::FILE_DIR);
        let dir: Vec<u8> = (0..20).map(|_| f.read()).collect();
        assert_eq!(dir, *b"\0\0\0\x01\0\0\0\x14\0\x20\0\0etc/e820");
        f.select(key::FIRST_FILE);
        assert_eq!(f.read(), 7);
    }
}

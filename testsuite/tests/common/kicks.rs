//! Kicks from another thread while an engine runs.

use bivisor_emulator::vcpu::Vcpu;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Ends the other thread, however `f` ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Has the engine kicked all the time that `f` takes with it.
pub fn during<T>(vcpu: &mut dyn Vcpu, f: impl FnOnce(&mut dyn Vcpu) -> T) -> T {
    let (kicker, over) = (vcpu.kicker(), AtomicBool::new(false));
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                kicker.kick();
                std::thread::sleep(Duration::from_micros(20));
            }
        });
        let _over = Over(&over);
        f(vcpu)
    })
}

//! What to change to get a better engine.

use super::host::Cpu;
use bivisor_kvm_backend::Kind;

/// Sentences, the most useful first.
pub fn advice(kind: Kind, cpu: &Cpu) -> Vec<String> {
    let mut out = Vec::new();
    let module = match cpu.vendor.as_str() {
        "AuthenticAMD" => "kvm_amd",
        _ => "kvm_intel",
    };
    let capable = cpu.virtualization != "none";
    match kind {
        Kind::VtX | Kind::Svm => out.push("Nothing: KVM is hardware virtualization here.".into()),
        Kind::Forbidden => out.push(
            "Let this user open /dev/kvm: `sudo usermod -aG kvm $USER`, then log in again; in a container give it the device \
             (`--device /dev/kvm`)."
                .into(),
        ),
        Kind::Absent if capable => out.push(format!(
            "Load the module: `sudo modprobe {module}`; in a container give it the device (`--device /dev/kvm`)."
        )),
        Kind::Broken => out.push("See what the kernel says about kvm: `dmesg | grep -i kvm`.".into()),
        Kind::Absent | Kind::Software => {}
    }
    if !capable && !matches!(kind, Kind::VtX | Kind::Svm) {
        match &cpu.hypervisor {
            Some(_) => out.push(format!(
                "This machine is virtual and its processor shows neither VT-x nor AMD-V: ask for nested virtualization (on the \
                 host: `{module}.nested=1` and the CPU model `host`), or for a bare-metal machine."
            )),
            None => out.push("Switch VT-x or AMD-V on in the firmware's settings.".into()),
        }
    }
    if kind == Kind::Software {
        out.push(
            "Until then the translator is the better engine: KVM is a software module here, user code runs natively in it but \
             every exit is dear and kernel code is interpreted."
                .into(),
        );
    }
    out
}

//! Landlock: no file, no socket, no signal beyond this process, whatever becomes reachable by a name.
//!
//! Rights are bound to descriptors when they are opened, so what the node hands in keeps working.

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};

/// The newest interface whose rights are named here; a kernel with an older one enforces what it has.
const NEWEST: ABI = ABI::V7;

/// Takes every right that Landlock knows of from the calling thread and the threads it will make. Requires `no_new_privs`.
pub fn no_access() -> Result<(), String> {
    let enforced = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        // Not one rule is added: a rule would be a permission.
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(|error| error.to_string())?;
    match enforced.ruleset {
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
        RulesetStatus::NotEnforced => Err("the kernel has no Landlock, or it is not in its list of security modules (lsm=landlock,…)".to_owned()),
    }
}

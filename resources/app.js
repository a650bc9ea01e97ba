// The page of app.py: photos are dropped anywhere or pasted, and numbers that are typed stay in their range.
() => {
    // Both are called at the end of an event, and return the new value of its field: none.
    window.emptied = () => {
        const focus = () => document.activeElement === document.body && document.querySelector("#photo button").focus();
        setTimeout(focus, 100);
        return null;
    };
    window.download = (file) => {
        if (file) Object.assign(document.createElement("a"), { href: file.url, download: file.orig_name }).click();
        return null;
    };
    const take = (files) => {
        const input = document.querySelector("#photo input[type=file]");
        if (!input || !files.length) return;
        const first = new DataTransfer();
        first.items.add(files[0]);
        input.files = first.files;
        input.dispatchEvent(new Event("change", { bubbles: true }));
        document.querySelector("#message p").textContent =
            files.length > 1 ? `One photo is taken: ${files[0].name}. Please drop the others one by one.` : "";
    };
    document.addEventListener("paste", (event) => take(event.clipboardData.files));
    document.addEventListener("dragover", (event) => {
        if (event.dataTransfer.types.includes("Files")) event.preventDefault();  // otherwise the browser would open it
    }, true);
    document.addEventListener("drop", (event) => {
        if (!event.dataTransfer.types.includes("Files")) return;
        event.preventDefault();
        event.stopPropagation();
        take(event.dataTransfer.files);
    }, true);
    document.addEventListener("change", ({ target }) => {
        if (target.type !== "number") return;
        const value = Math.min(target.max, Math.max(target.min, target.value));
        if (target.value !== "" && value != target.value) {
            target.value = value;
            target.dispatchEvent(new Event("input", { bubbles: true }));
        }
    }, true);
}

"""A client that sends the requests of app.py's page without a browser, so that many fit on one machine."""

import json
import uuid

SETTINGS = {"temperature": 0.38, "saturation": 1, "across": 50, "down": 50, "reach": 20}


class PageClient:
    """One user. Requests that the page answers with an error message raise a RuntimeError with it."""

    def __init__(self, address):
        import httpx  # which Gradio needs, too

        self.http, self.session = httpx.Client(base_url=address, timeout=300), uuid.uuid4().hex
        config = json.loads(self._get("config"))
        self.components = {x["props"].get("label") or str(x["props"].get("value")): x for x in config["components"]}
        self.events = config["dependencies"]
        self.weights = self.components["Model"]["props"]["value"]

    def upload(self, name, data, **headers):
        """Upload a photo and return the server's response."""
        return self.http.post("gradio_api/upload", files={"files": (name, data)}, headers=headers)

    def take(self, name, data):
        """Upload a photo and return the addresses of the three pictures, all gray until the network has run."""
        (path,) = self.upload(name, data).raise_for_status().json()
        self.taken = self._event("Drop, paste or choose a photo", "upload")
        output = self._run(self.taken, {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}})
        return self._addresses([*output[1], output[2]])

    def color(self, **settings):
        """Run the events that follow an upload and return the addresses of gray and colorized."""
        compute = self._after(self.taken)
        self._run(compute, None, self.weights)
        return self._addresses(self._adjust(self._after(compute), settings)[0])

    def change(self, component, event="input", **settings):
        """Trigger the event of a component and return the addresses of gray and colorized."""
        return self._addresses(self._adjust(self._event(component, event), settings)[0])

    def download(self, name="PNG", **settings):
        """Return the bytes of the file that a button creates."""
        (file,) = self._adjust(self._event(f"Save as {name}", "click"), settings)
        return self._get(file["url"])

    def _adjust(self, event, settings):
        return self._run(event, None, *{**SETTINGS, **settings}.values())

    def _after(self, event):
        return next(x for x in self.events if x["trigger_after"] == event["id"] and x["backend_fn"])

    def _event(self, component, kind):
        return next(x for x in self.events if [self.components[component]["id"], kind] in x["targets"])

    def _run(self, event, *inputs):
        request = {"data": inputs, "fn_index": event["id"], "session_hash": self.session}
        self.http.post("gradio_api/queue/join", json=request).raise_for_status()
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(message["output"]["error"])
                    return message["output"]["data"]
        raise RuntimeError("no answer")

    def _get(self, address):
        return self.http.get(address).raise_for_status().content

    @staticmethod
    def _addresses(pictures):
        return [x["url"] for x in pictures]

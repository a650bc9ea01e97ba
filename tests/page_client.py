"""A client that sends the requests of app.py's page without a browser, so that many fit on one machine."""

import json
import urllib.request
import uuid


class PageClient:
    def __init__(self, address):
        self.address, self.session = address, uuid.uuid4().hex
        config = json.loads(self._get("config"))
        components = config["components"]
        self.components = {x["props"].get("elem_id") or str(x["props"].get("value")): x for x in components}
        self.events = config["dependencies"]
        self.weights = self.components["weights"]["props"]["value"]

    def take(self, name, data):
        """Upload a photo and return the addresses of its two pictures, both gray; None if it is rejected."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body = head + data + f"\r\n--{boundary}--\r\n".encode()
        (path,) = json.loads(self._get("gradio_api/upload", body, f"multipart/form-data; boundary={boundary}"))
        self.taken = self._event("photo", "upload")
        output = self._run(self.taken, {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}})
        return self._addresses(output[1])

    def color(self, temperature=0.38):
        """Run the events that follow an upload and return the addresses of gray and colorized."""
        compute = self._after(self.taken)
        self._run(compute, None, self.weights)
        return self._addresses(self._run(self._after(compute), None, temperature, 50, 50)[0])

    def move(self, temperature):
        return self._addresses(self._run(self._event("temperature", "input"), None, temperature, 50, 50)[1])

    def download(self, temperature=0.38, name="PNG"):
        """Return the bytes of the file that a button creates."""
        (file,) = self._run(self._event(f"Save as {name}", "click"), None, temperature)
        return self._get(file["url"])

    def _after(self, event):
        return next(x for x in self.events if x["trigger_after"] == event["id"])

    def _event(self, component, kind):
        return next(x for x in self.events if [self.components[component]["id"], kind] in x["targets"])

    def _run(self, event, *inputs):
        request = {"data": inputs, "fn_index": event["id"], "session_hash": self.session}
        self._get("gradio_api/queue/join", json.dumps(request).encode(), "application/json")
        address = f"{self.address}/gradio_api/queue/data?session_hash={self.session}"
        with urllib.request.urlopen(address, timeout=300) as stream:
            for line in stream:
                message = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(message["output"]["error"])
                    return message["output"]["data"]
        raise RuntimeError("no answer")

    def _get(self, address, body=None, kind=None):
        address = address if address.startswith("http") else f"{self.address}/{address}"
        request = urllib.request.Request(address, body, {"Content-Type": kind} if kind else {})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.read()

    @staticmethod
    def _addresses(pictures):
        return [x["url"] for x in pictures] if isinstance(pictures, list) else None
